"""Expert load, placement and reports. Algorithms are pure functions on arrays; never knows models or servers."""
