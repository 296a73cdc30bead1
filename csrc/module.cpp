// The Python module `_C`. Importing it registers every operator: the schemas are compiled in, and the CPU kernels come
// from the one sibling library, _cpu_<set>, that fits the processor. _cuda is loaded from Python (ops/library.py),
// where a missing driver or a CPU-only torch can be explained.

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

// The folder of this very library, with a slash at its end.
std::string own_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<const void*>(&own_folder), &info))
    throw std::runtime_error("casm_fast: the dynamic loader does not know where _C lies");
  std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1);
}

// The widest instruction set that the processor has. ATEN_CPU_CAPABILITY, torch's own switch, can lower it.
std::string instruction_set() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = wish ? wish : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (limit == "default" || !avx2) return "baseline";
  if (limit == "avx2" || !avx512) return "avx2";
  return "avx512";
#else
  return "baseline";
#endif
}

std::string loaded_set;

void load_cpu_kernels() {
  loaded_set = instruction_set();
  const std::string path = own_folder() + "_cpu_" + loaded_set + ".so";
  // The kernels register themselves with torch while they load, and stay loaded for the life of the process.
  if (!dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL))
    throw std::runtime_error(std::string("casm_fast: expected the CPU kernels beside _C, got: ") + dlerror() +
                             "; build them with: pip install -e .");
}

std::string flags_of(const std::string& set) {
  if (set == "avx2") return CASM_FAST_FLAGS_avx2;
  if (set == "avx512") return CASM_FAST_FLAGS_avx512;
  return "";
}

py::dict build_info() {
  py::dict info;
  info["version"] = CASM_FAST_VERSION;
#ifdef __clang__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["torch"] = CASM_FAST_TORCH_VERSION;
  info["instruction_sets"] = py::module_::import("builtins").attr("str")(CASM_FAST_INSTRUCTION_SETS).attr("split")(",");
  info["instruction_set"] = loaded_set;
  info["flags"] = "-O3 -fno-math-errno " + flags_of(loaded_set);
  info["cuda"] = CASM_FAST_CUDA_STATE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers the operators of casm_fast with torch.";
  load_cpu_kernels();
  m.def("build_info", &build_info, "What this build is: compiler, flags, instruction sets, CUDA.");
}
