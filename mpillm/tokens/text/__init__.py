"""Where text comes from: files found, recognized, decoded, and cut into parts."""
