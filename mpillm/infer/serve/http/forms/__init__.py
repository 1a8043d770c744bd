"""OpenAI's forms: what a client asks for, checked field by field, and how it is answered."""
