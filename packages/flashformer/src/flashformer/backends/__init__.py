"""What executes a plan: native code on the CPU, a kernel on a GPU, or plain torch."""
