"""What is kept of a training run: statistics, the last bad batch, plots of both."""
