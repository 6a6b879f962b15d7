"""One benchmark per op of iris_kernels, and the gates on its compiled kernels."""
