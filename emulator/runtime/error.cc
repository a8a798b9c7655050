// Messages about faults: place, cause and thread.
#include "runtime.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

namespace emu {

static std::string formatted(const char* format, va_list args) {
    char text[2048];
    vsnprintf(text, sizeof text, format, args);
    return text;
}

std::string printed(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = formatted(format, args);
    va_end(args);
    return text;
}

// "file:line" of a return address, by addr2line: slow, and used for faults only.
static std::string source_line(const void* pc) {
    Dl_info info;
    if (!dladdr(pc, &info)) return "kernel code";
    size_t offset = (const char*)pc - (const char*)info.dli_fbase - 1;
    std::string command = printed("addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
    std::string line;
    if (FILE* pipe = popen(command.c_str(), "r")) {
        char text[256];
        if (fgets(text, sizeof text, pipe)) line = text;
        pclose(pipe);
    }
    line = line.substr(0, line.find_first_of(" \n"));
    return line.empty() || line[0] == '?' ? "kernel code" : line;
}

std::string Site::text() const {
    if (!file) return pc ? source_line(pc) : "kernel code";
    const char* name = strrchr(file, '/');
    return printed("%s:%d", name ? name + 1 : file, line);
}

void fail_at(const Site& site, const char* format, ...) {
    va_list args;
    va_start(args, format);
    worker->error = site.text() + ": " + formatted(format, args);
    va_end(args);
    if (const Thread* t = self())
        worker->error += printed("  [block(%u,%u,%u) thread %d, warp %d lane %d]", t->bid.x, t->bid.y, t->bid.z,
                                 t->index, t->warp, t->lane);
    leave();
    abort();
}

}  // namespace emu
