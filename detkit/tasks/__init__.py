"""Tasks: mapping to source pixels, scoring, drawing and output files for heads of one kind; one module per task."""
