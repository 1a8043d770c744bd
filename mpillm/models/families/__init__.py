"""Which published architectures are one of ours? Hugging Face's settings and names, both ways."""
