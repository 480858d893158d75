"""Training: what is minimised, one step of it, the loop around it, and what a run leaves behind."""
