"""What a run and a model version are made of (`version`), and what happened to them (`ledger`)."""
