"""How far a bundle is from the full-precision, uncached original, and what it saves.

Empty: `report` reads files alone, and is not to wait for the imports of what runs pipelines.
"""
