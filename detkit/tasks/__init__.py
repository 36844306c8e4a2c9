"""What surrounds the heads of one kind: pixels of the source, scores, pictures and files; one module a task."""
