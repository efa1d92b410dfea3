"""How many bytes a pipeline takes, where its weights would lie, and carrying that out."""
