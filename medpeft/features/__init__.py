"""What a model computes before its first trainable tensor: the same in every epoch, so computed once."""
