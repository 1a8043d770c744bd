"""How is one training step spread over ranks?"""
