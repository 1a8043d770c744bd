"""Tasks that learn which of two answers, or which answers, people prefer."""
