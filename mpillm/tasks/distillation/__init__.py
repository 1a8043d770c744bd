"""Knowledge distillation: a student learns from the distributions and the layers of a teacher."""
