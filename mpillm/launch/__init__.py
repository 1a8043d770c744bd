"""How does a job start?"""
