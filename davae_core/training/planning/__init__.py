"""What a training costs, counted from shapes: parameters, arithmetic, bytes. Nothing is run and no file is read."""
