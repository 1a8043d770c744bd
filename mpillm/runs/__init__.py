"""What did a run leave? Its folder, metrics, history, lock, state, status, report; no torch, no MPI."""
