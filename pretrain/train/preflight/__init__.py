"""What a run will be and need, and why it cannot work: told before a rank starts and without a tower's memory."""
