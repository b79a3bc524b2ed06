"""Host-side code that several backends share."""
