"""What any network is made of, and its state while it is looked at; torch only."""
