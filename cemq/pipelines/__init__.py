"""What a pipeline is and how it is run: opening it, its batches, its noise scheduler, its outputs."""
