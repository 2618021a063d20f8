"""What every reproduction is made with."""
