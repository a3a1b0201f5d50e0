#pragma once
// lshmoe-bench layer: the MoE layer's forward and backward beside a reference in the same run.

namespace lshmoe::launch {

/// Runs the subcommand; argv[0] is its name. Alone or under mpirun: collective over the job. Rank 0
/// prints a table. Returns the exit code; what is wrong is logged.
int bench_layer(int argc, char** argv);

}  // namespace lshmoe::launch
