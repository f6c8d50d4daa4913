from kernels.cpu.openmp import sleep_while_waiting

sleep_while_waiting()  # before any module here loads torch
