"""What Lightning trains, one run or several at once."""
