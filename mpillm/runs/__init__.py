"""What did a run leave? Its folder, metrics and sinks, history, lock, state, submit, report."""
