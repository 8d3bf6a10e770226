"""What work cost in joules: counters (`sensor`) and the windows between two readings of them (`meter`)."""
