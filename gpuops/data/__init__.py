"""From an archive to a training batch: where the data is, under which identity, who reads what and when."""
