"""Conversations: their formats, the templates that write them, and which tokens are learnt."""
