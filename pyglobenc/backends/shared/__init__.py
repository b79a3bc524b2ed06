"""What several backends share on the host."""
