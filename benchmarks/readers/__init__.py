"""Models as their readers compute them: mpillm, transformers, llama.cpp."""
