"""Rewards of answers that can be checked: by the data's answer, or by a form."""
