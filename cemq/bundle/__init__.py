"""The saved form of a quantized, scheduled pipeline, and its life: written, loaded, drawn with, sent on."""
