"""Video codecs: the decoders, and encoders where they exist, that turn latents into pixels and back."""
