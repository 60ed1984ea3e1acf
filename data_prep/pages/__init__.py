"""What people look at: HTML pages that need no other file."""
