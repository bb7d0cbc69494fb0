"""Black boxes: functions, ONNX files and HTTP endpoints that return scores, queried within a budget."""
