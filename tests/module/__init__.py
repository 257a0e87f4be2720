"""lstm_triton.LSTM, LSTMCell and lstm: what they compute, on which path, and what is told of it."""
