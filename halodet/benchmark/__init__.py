"""What the benchmark tools measure with: contenders side by side in one process, memory in processes of their own."""
