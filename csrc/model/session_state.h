// Keys and values of consecutive positions of a session as bytes that outlive it; see pe_session_save.
//
// A state is a header, the tokens as int32, and the rows of the cache: [layer][kv head][position][row], keys, then values.
// Little-endian, as everything the engine reads. Restoring checks all of it before it changes the session.
#pragma once

#include <cstddef>
#include <cstdint>

#include "model/model.h"
#include "runtime/prefix_cache.h"

namespace pe {

// Of n positions. n is at most the cache's positions, so it cannot overflow: the cache itself is larger.
size_t state_bytes(const KvCache::Shape& shape, size_t n);

// Writes the state of positions [first, first + n), which the sequence holds: state_bytes(n) bytes.
void write_state(const Model& model, Sequence& sequence, size_t first, size_t n, uint8_t* out);

// Appends the positions of a state to the sequence. Throws Error, and changes nothing:
//   kFormat      foreign_state, bad_version, cut_state, damaged_state
//   kArgument    other_model, other_kv_type, other_text (it follows other tokens than the sequence holds)
//   kUnsupported other_epoch
//   kContextFull context_full
void read_state(const Model& model, Sequence& sequence, const uint8_t* data, size_t size);

}  // namespace pe
