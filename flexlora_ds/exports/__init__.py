"""What exports share: a smaller adapter, a merged model, and the comparison of logits on the base."""
