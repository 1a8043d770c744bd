"""Which faults does the doctor find? One check, one file."""
