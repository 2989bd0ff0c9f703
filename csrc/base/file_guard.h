// The opt-in guard of mapped files. Reading a mapped page that is gone (something else truncated the file, or its disk
// failed) is SIGBUS, which ends a process. Guarded, the whole mapping reads as zeros from then on, and remembers it.
#pragma once

#include <cstddef>

namespace pe {

// From now on MappedFile::map guards what it maps. Installs a SIGBUS handler, once and for the life of the process; any
// other SIGBUS goes on to the handler that was there before. Nothing on Windows, which lets nobody change a mapped file.
void guard_mapped_files();
[[nodiscard]] bool mapped_files_guarded();

// A mapping that the handler knows. Never freed but used again, because the handler may look at it at any moment.
struct GuardedRange;

// Called before the first read and after the last one. guard_range throws std::bad_alloc.
[[nodiscard]] GuardedRange* guard_range(const std::byte* data, size_t size);
void release_range(GuardedRange* range) noexcept;
// Whether a page was gone when somebody read it.
[[nodiscard]] bool range_lost(const GuardedRange& range);

}  // namespace pe
