"""MPI-native training of large language models: one room a question, see the README's tree."""
