"""What work cost in joules: counters (`sensor`), their course (`track`, `sampler`), windows (`meter`), the split."""
