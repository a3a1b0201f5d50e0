#include "lshmoe/comm/groups.hpp"

#include "lshmoe/runtime/error.hpp"

namespace lshmoe {
ExpertGroups make_expert_groups(std::shared_ptr<Communicator> world, int ep_size) {
  LSHMOE_VALIDATE(world != nullptr, "make_expert_groups got no world: pass Session::world()");
  const int rank = world->rank();
  const int size = world->size();
  if (ep_size == 0) ep_size = size;
  LSHMOE_VALIDATE(ep_size > 0 && size % ep_size == 0, "ep_size ", ep_size, " does not divide the ",
                  detail::counted(size, "rank"),
                  " of the job (each replica of the experts takes ep_size ranks): start a "
                  "multiple of ep_size ranks or change --ep-size");

  // The node of a rank is the first rank of its host; its rail, its place among that host's ranks.
  int node = rank;
  int local_rank = 0;
  for (int other = rank - 1; other >= 0; --other) {
    if (world->host(other) != world->host(rank)) continue;
    node = other;
    ++local_rank;
  }

  ExpertGroups groups;
  groups.expert = world->split(rank / ep_size, rank, "expert");
  groups.replica = world->split(rank % ep_size, rank, "replica");
  groups.node = world->split(node, rank, "node");
  groups.rail = world->split(local_rank, rank, "rail");
  groups.world = std::move(world);
  return groups;
}

}  // namespace lshmoe
