"""Models that only answer: a function, an ONNX file or an HTTP endpoint, asked within a budget."""
