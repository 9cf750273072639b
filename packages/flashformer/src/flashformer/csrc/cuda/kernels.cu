// The entry points. Which ones a module has is its FF_MODE; FF_BLOCKS is how many blocks share an SM.
#include "graph.cuh"
#include "probe.cuh"

#define FF_MEGAKERNEL 0
#define FF_GRAPH 1

#define FF_KERNEL extern "C" __global__ void __launch_bounds__(ff::THREADS, FF_BLOCKS)

#if FF_MODE == FF_MEGAKERNEL
FF_KERNEL ff_decode(const __grid_constant__ ff::Model m) { ff::decode(m); }
FF_KERNEL ff_probe_waits(const __grid_constant__ ff::Model m, int rounds) { ff::probe_waits(m, rounds); }
FF_KERNEL ff_probe_stream(const __grid_constant__ ff::Model m) { ff::probe_stream(m); }
#else
FF_KERNEL ff_qkv(const __grid_constant__ ff::Model m, int layer) { ff::qkv_stage(m, layer); }
FF_KERNEL ff_attention(const __grid_constant__ ff::Model m, int layer) { ff::attention_stage(m, layer); }
FF_KERNEL ff_output(const __grid_constant__ ff::Model m, int layer) { ff::output_stage(m, layer); }
FF_KERNEL ff_up(const __grid_constant__ ff::Model m, int layer) { ff::up_stage(m, layer); }
FF_KERNEL ff_down(const __grid_constant__ ff::Model m, int layer) { ff::down_stage(m, layer); }
FF_KERNEL ff_head(const __grid_constant__ ff::Model m) { ff::head_stage(m); }
FF_KERNEL ff_advance(const __grid_constant__ ff::Model m) { ff::advance_stage(m); }
#endif
