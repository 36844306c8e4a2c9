"""What surrounds the heads of one kind: pixels of the source, scores, images and files; one module a task."""
