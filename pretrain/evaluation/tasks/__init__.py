"""One module a task, each with

lacks(data) -> str | None           why this data set has nothing for the task, for a reader; None where it has
run(task, given) -> TaskResult      writes its table of rows into given.out_dir, and returns its numbers
"""
