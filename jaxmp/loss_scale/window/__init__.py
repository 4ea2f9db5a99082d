"""One step over a window of micro-batches, and over the devices of a mesh."""
