"""Text encoders: prompts in, embeddings out."""
